"""Models in the files of other runtimes: ONNX, OpenVINO, torch.export, ExecuTorch, LiteRT, Core ML."""
