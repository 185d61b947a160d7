"""NVIDIA A100 SXM 80 GB with TensorRT.

624 TOPS with 8-bit integers, 312 TFLOPS with 16-bit floats, 156 with TF32, without sparsity; 2,039
gigabytes a second. TensorRT quantizes convolutions to 8 bits alone; linear layers may also have
weights of 4 bits, stored two in a byte, whose products are computed with 16-bit floats.

Source: NVIDIA, "A100 Tensor Core GPU" data sheet; "TensorRT Documentation", Working with Quantized
Types.
"""

from hw.models.roofline import Roofline

TARGET = Roofline(
    peaks={8: 312e12, 16: 156e12, 32: 78e12},
    bandwidth=2_039e9,
    memory=("memory_bytes", 80e9),
    stored_bits=(4, 8, 16, 32),
    only_linear=(4,),
    act_bits=(8,),
)
