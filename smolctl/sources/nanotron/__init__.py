"""Reads nanotron's training YAML, including SmolLM2's, as a model config and a training recipe.

Fields as in `config_smollm2_135M.yaml` of huggingface/smollm. A step of nanotron is
micro_batch_size × batch_accumulation_per_replica × dp sequences.
"""
