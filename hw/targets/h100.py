"""NVIDIA H100 SXM with TensorRT.

1,979 TOPS with 8-bit integers, 989 TFLOPS with 16-bit floats, 495 with TF32, without sparsity;
3,350 gigabytes a second. Bitwidths as on the A100: TensorRT quantizes convolutions to 8 bits alone;
linear layers may also have weights of 4 bits, whose products are computed with 16-bit floats.

Source: NVIDIA, "H100 Tensor Core GPU" data sheet; "TensorRT Documentation", Working with Quantized
Types.
"""

from hw.models.roofline import Roofline

TARGET = Roofline(
    peaks={8: 989.5e12, 16: 494.7e12, 32: 247.4e12},
    bandwidth=3_350e9,
    memory=("memory_bytes", 80e9),
    stored_bits=(4, 8, 16, 32),
    only_linear=(4,),
    act_bits=(8,),
)
