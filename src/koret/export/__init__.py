"""Ship a model: merged, ONNX, OpenVINO, int8, smaller; each proven to rank as the original does."""
