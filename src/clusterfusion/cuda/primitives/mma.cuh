// Matrix products of a warp on the tensor cores, with tf32 operands: fp32 with 10 bits of fraction, which fp16 and bf16 values are
// exactly. An fp32 value is two of them, to 21 bits.
#pragma once

namespace clusterfusion {

// The nearest tf32 value, as fp32.
__device__ __forceinline__ float to_tf32(float value) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
}

// c += a b, a of 16 rows and 8 columns, b of 8 and 8, all in tf32. With g = lane / 4 and t = lane % 4, a lane has of a, at (row, column),
// (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of b (t, g) and (t + 4, g), and of c (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_16x8x8(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

}  // namespace clusterfusion
