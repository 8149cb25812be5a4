/* A libcuda.so.1 without a GPU: device memory is the host's. Built by test_cuda.py. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long ptr;
#ifndef DEVICES
#define DEVICES 1
#endif
static int has_context = 0;
static long live = 0;

int cuInit(unsigned flags) { return DEVICES < 0 ? 100 : flags; }
int cuGetErrorString(int code, const char **text) {
    if (code == 999) return 1;
    *text = code == 2 ? "out of memory" : "no CUDA-capable device is detected";
    return 0;
}
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return index < DEVICES ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Fake GPU", size); return device == 40 ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 6 : -1;
    return device == 40 ? 0 : 101;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 6ull << 32; return device == 40 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x1234567890ll; return device == 40 ? 0 : 101; }
int cuCtxSetCurrent(void *context) { has_context = context == (void *)0x1234567890ll; return has_context ? 0 : 201; }
int cuMemAlloc_v2(ptr *address, size_t size) {
    if (!has_context) return 201;
    if (size > 1ull << 40) return 2;
    *address = (ptr)aligned_alloc(256, (size + 255) / 256 * 256);
    live++;
    return 0;
}
int cuMemFree_v2(ptr address) { free((void *)address); live--; return 0; }
int cuMemsetD8Async(ptr address, unsigned char value, size_t size, void *stream) {
    memset((void *)address, value, size);
    return stream == (void *)0x777700007777ll ? 0 : 400;
}
int cuMemcpyHtoDAsync_v2(ptr to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream == (void *)0x777700007777ll ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, ptr from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream == (void *)0x777700007777ll ? 0 : 400;
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)0x777700007777ll; return flags == 1 ? 0 : 1; }
int cuStreamSynchronize(void *stream) { return stream == (void *)0x777700007777ll ? 0 : 999; }
long fake_live(void) { return live; }
