"""nanotron's training YAML, SmolLM2's among them, as a model config and a training recipe.

Fields as in `config_smollm2_135M.yaml` of huggingface/smollm. A step of nanotron is
micro_batch_size × batch_accumulation_per_replica × dp sequences.
"""
