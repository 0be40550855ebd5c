/* Included before every C++ file of llama.cpp. GCC's AMX intrinsics do not tell the compiler which memory they read (the first 8 bytes
 * of a tile configuration of 64, nothing of a tile), so it drops what was written there, and the next tile instruction crashes. Here
 * everything written before is in memory when they run. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#define CARTWRIGHT_WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")

#define _tile_loadconfig(config)       \
    do {                               \
        CARTWRIGHT_WRITTEN(config);    \
        (_tile_loadconfig)(config);    \
    } while (0)

#undef _tile_loadd
#define _tile_loadd(tile, base, stride)             \
    do {                                            \
        CARTWRIGHT_WRITTEN(base);                   \
        _tile_loadd_internal(tile, base, stride);   \
    } while (0)

#undef _tile_stream_loadd
#define _tile_stream_loadd(tile, base, stride)             \
    do {                                                   \
        CARTWRIGHT_WRITTEN(base);                          \
        _tile_stream_loadd_internal(tile, base, stride);   \
    } while (0)
#endif
