from pallas_kernels.tile_attention.reference import attention as attention
