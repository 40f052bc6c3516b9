"""FourierFT around linear layers: the update is made by torch's inverse FFT for each forward."""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners._buffer_dict import BufferDict
from peft_fast.tuners.method import AddedLayer


class FourierFTLayer(AddedLayer):
    """fourierft_spectrum: {adapter: [n_frequency]}; indices: where these are in the spectrum, [2, n_frequency]."""

    fourierft_spectrum: nn.ParameterDict
    fourierft_n_frequency: dict[str, int]
    fourierft_scaling: dict[str, float]
    fourierft_random_loc_seed: dict[str, int]
    indices: BufferDict
    method = "fourierft"
    adds_to_weight = True
    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")
    how = "the base layer is called, and the update is a product with the inverse Fourier transform of the spectrum"

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        (N, K), n_frequency = self.weight_shape(), options["n_frequency"]
        if n_frequency > N * K:
            raise ValueError(f"n_frequency must be at most {N * K} for a layer of {N} x {K}, got {n_frequency}")
        if not isinstance(self.indices, BufferDict):
            self.indices = BufferDict()
        self.fourierft_n_frequency[adapter_name], self.fourierft_scaling[adapter_name] = n_frequency, config.scaling
        self.fourierft_random_loc_seed[adapter_name] = config.random_loc_seed
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        places = torch.randperm(N * K, generator=generator, device="cpu")[:n_frequency]
        self.indices[adapter_name] = torch.stack([places // K, places % K])
        spectrum = torch.randn(n_frequency)  # drawn in any case, as in peft
        self.fourierft_spectrum[adapter_name] = nn.Parameter(0 * spectrum if config.init_weights else spectrum)

    def delta(self, name: str) -> Tensor:
        """[N, K], in the spectrum's dtype."""
        spectrum = self.fourierft_spectrum[name]
        wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))  # torch transforms no 16 bits
        dense = wide.new_zeros(self.weight_shape())
        rows, columns = self.indices[name].to(wide.device)
        dense[rows, columns] = wide
        return (torch.fft.ifft2(dense).real * self.fourierft_scaling[name]).to(spectrum.dtype)


class FourierFTLinear(FourierFTLayer):
    """FourierFT around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., in]."""
