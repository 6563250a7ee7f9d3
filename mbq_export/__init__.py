"""From a vision-language model to a 3-bit TensorRT engine: calibrate, quantize, export, build, run, evaluate."""

__version__ = "0.1.0"
