"""Hugging Face, Lightning and every other program that says ``import deepspeed``.

``table`` each name of DeepSpeed's surface, and what stands behind it here; ``names`` looks it up · ``facade`` makes
modules of the table · ``finder`` puts them where Python looks, and tells importlib.metadata · ``start`` a process group
that Accelerate finds too · ``parameters`` what ``ds_id`` and its kin answer · ``stand_ins``, ``accelerator``,
``optimizers``, ``collectives``, ``groups``, ``utilities``, ``facts``, ``zero_files`` the little that is no alias ·
``document`` the page of all names. Logic of training does not live here: what a script reaches through these names is
tritonspeed's own.
"""
