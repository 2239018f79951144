r"""The graph that `benchmarks/browser.py --onnx` runs: int8 weights with dynamic activations.

pip install onnxruntime onnxruntime-genai onnx
smolctl push SmolLM2-135M-Instruct.Q4_1.gguf --local-dir hf --license apache-2.0
python -m onnxruntime_genai.models.builder -i hf -o onnx -p fp32 -e cpu -c cache \
    --extra_options shared_embeddings=false
python benchmarks/browser/make_onnx.py onnx/model.onnx model-q8.onnx
"""

from __future__ import annotations

import sys

from onnxruntime.quantization import QuantType, quantize_dynamic

if __name__ == "__main__":
    quantize_dynamic(sys.argv[1], sys.argv[2], weight_type=QuantType.QInt8)
