/* Stands in for NVIDIA's driver, libcuda.so.1: says what it is asked to do, and does nothing. */
#include <stdio.h>
#include <string.h>

static int say(const char* what) {
    puts(what);
    fflush(stdout);
    return 0;
}

static int nothing(void) { return 0; }
static int version(int* to) { return *to = 13010, 0; }
static int get_device(int* device, int index) { return *device = index, 0; }
static int retain(void** context, int device) {
    char text[64];
    snprintf(text, sizeof text, "context of device %d", device);
    return *context = (void*)0x10, say(text);
}
static int push(void* context) { return say(context == (void*)0x10 ? "push" : "push of another context"); }
static int pop(void** context) { return *context = (void*)0x10, say("pop"); }
static int load(void** module, const char* image) {
    if (memcmp(image,
               "\x7f"
               "ELF",
               4))
        return say("load of no cubin"), 200;
    return *module = (void*)0x20, say("load");
}
static int get_function(void** function, void* module, const char* name) {
    char text[128];
    snprintf(text, sizeof text, "function %s", name);
    return *function = (void*)0x30, say(text), module == (void*)0x20 && !strstr(name, "missing") ? 0 : 500;
}
static int set_attribute(void* function, int attribute, int value) {
    char text[64];
    snprintf(text, sizeof text, "attribute %d is %d", attribute, value);
    return say(text);
}
static int launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void* stream, void** parameters, void** extra) {
    const long long* arguments = parameters[0];
    char text[256];
    snprintf(text, sizeof text, "launch %u %u %u of %u %u %u, shared %u, stream %p, arguments %lld %lld %lld", gx, gy,
             gz, bx, by, bz, shared, stream, arguments[0], arguments[1], arguments[2]);
    return say(text), gx == 7 ? 1 : extra != 0;
}
static int error_name(int error, const char** to) {
    return *to = error == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR", 0;
}
static int error_text(int error, const char** to) { return *to = error == 500 ? "not found" : "wrong", 0; }

int cuGetProcAddress_v2(const char* name, void** to, int version_asked, unsigned long long flags, void* status) {
    static const struct {
        const char* name;
        void* function;
    } known[] = {
        {"cuDriverGetVersion", version},
        {"cuDeviceGet", get_device},
        {"cuDevicePrimaryCtxRetain", retain},
        {"cuCtxPushCurrent", push},
        {"cuCtxPopCurrent", pop},
        {"cuModuleLoadData", load},
        {"cuModuleGetFunction", get_function},
        {"cuFuncSetAttribute", set_attribute},
        {"cuLaunchKernel", launch},
        {"cuGetErrorName", error_name},
        {"cuGetErrorString", error_text},
        {"cuGetProcAddress", cuGetProcAddress_v2},
    };
    *to = nothing;
    for (unsigned i = 0; i < sizeof known / sizeof *known; ++i)
        if (!strcmp(name, known[i].name)) *to = known[i].function;
    return 0;
}
int cuGetProcAddress(const char* name, void** to, int version_asked, unsigned long long flags) {
    return cuGetProcAddress_v2(name, to, version_asked, flags, 0);
}
