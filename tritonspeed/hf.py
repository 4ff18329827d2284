"""``import tritonspeed.hf`` as a script's first line: from then on ``deepspeed`` is tritonspeed, in this process.

Trainer, Accelerate, TRL, PEFT and Lightning find it under that name, and their DeepSpeed options and configs apply.
Nothing is needed in a script that ``tritonspeed run`` starts.
"""

from tritonspeed.integrations.finder import install

install()
