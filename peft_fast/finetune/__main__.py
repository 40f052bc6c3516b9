import sys

from peft_fast.finetune.run import main

sys.exit(main())
