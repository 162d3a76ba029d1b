/* The calls into CUDA's runtime that PyTorch makes before it looks at a tensor's data, for a machine without a
   GPU: one device, and every call succeeds. Loaded before libcudart (LD_PRELOAD); nothing can be computed. */
static int current = 0;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) { current = device; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaFree(void *pointer) { return 0; }

/* The driver's functions that PyTorch looks up in libcuda.so.1, which is this library's name. */
int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) { *context = &current; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain() { return 0; }
int cuFuncGetAttribute() { return 0; }
int cuFuncSetAttribute() { return 0; }
int cuGetErrorString() { return 0; }
int cuLaunchCooperativeKernel() { return 0; }
int cuLaunchKernel() { return 0; }
int cuLaunchKernelEx() { return 0; }
int cuLinkAddData_v2() { return 0; }
int cuLinkComplete() { return 0; }
int cuLinkCreate_v2() { return 0; }
int cuModuleGetFunction() { return 0; }
int cuModuleLoadData() { return 0; }
int cuModuleLoadDataEx() { return 0; }
int cuModuleUnload() { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
