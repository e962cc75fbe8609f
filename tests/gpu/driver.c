/* A stand-in for NVIDIA's driver and for the one function of torch's library for CUDA that the launcher asks for: it
   launches nothing, and remembers every launch. standin.py compiles it, as libcuda.so.1.

   How many bytes an argument has it reads as the driver does, from the code: each parameter has a record in the
   section .nv.info.<kernel> of a cubin (EIATTR_KPARAM_INFO). For kernels that a test doesn't compile there is an image
   of another kind: "STANDIN", the number of parameters, and their bytes. */
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARAMETERS = 64, LAUNCHES = 4096 };

struct function {
  char name[128];
  const unsigned char* image;
  void* context;
  int parameters, sizes[PARAMETERS];
};

struct launch {
  const struct function* function;
  unsigned grid[3], block[3], shared;
  void *stream, *context;
  int parameters, sizes[PARAMETERS];
  uint64_t values[PARAMETERS];
};

static struct launch launches[LAUNCHES];
static int launched, recording = 1, failing, pushed, capturing;
static _Thread_local int capture_mode; /* of calls that a capture may not have: 0 forbids them, 2 doesn't */
static char called[1 << 16];
static _Thread_local void* current_context;
static uint64_t current_stream = 0x57;
static struct function functions[LAUNCHES];
static int loaded;
/* Threads launch at the same time: two that appended to `called` together ran over its end, into `failing`. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* What tests ask for. */
int standin_count(void) { return launched; }
const struct launch* standin_launch(int i) { return &launches[i]; }
void standin_reset(void) { launched = 0; }
void standin_record(int on) { recording = on; }
void standin_fail(int code) { failing = code; }
void standin_stream(uint64_t stream) { current_stream = stream; }
void standin_context(uint64_t context) { current_context = (void*)context; }
int standin_pushed(void) { return pushed; }
/* The functions that were called, with spaces between, since it was last asked for. */
const char* standin_called(void) {
  static char before[sizeof(called)];
  pthread_mutex_lock(&lock);
  memcpy(before, called, sizeof(called));
  called[0] = 0;
  pthread_mutex_unlock(&lock);
  return before;
}
/* 1: a stream is captured, and the driver one of CUDA 12.3 or later; 2: an older one. */
void standin_capture(int how) { capturing = how; }
int standin_capture_mode(void) { return capture_mode; }

static void note(const char* name) {
  pthread_mutex_lock(&lock);
  if (recording && strlen(called) + strlen(name) + 2 < sizeof(called)) strcat(strcat(called, name), " ");
  pthread_mutex_unlock(&lock);
}
/* What a call other than a launch comes to while a stream is captured: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED. */
static int permitted(const char* name) {
  note(name);
  return capturing == 2 || (capturing && capture_mode != 2) ? 900 : 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  return capture_mode = *mode, *mode = before, 0;
}

int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  note(__func__);
  *stream = (void*)(current_stream + 0x1000 * (uint64_t)device);
  return 0;
}

#ifndef STANDIN_OLD /* a driver that lacks it */
int cuLaunchKernel(struct function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  (void)extra;
  note(__func__);
  if (failing) return failing;
  if (capturing && !stream) return 906; /* CUDA_ERROR_STREAM_CAPTURE_IMPLICIT: the legacy stream */
  if (!current_context) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  pthread_mutex_lock(&lock);
  if (launched == LAUNCHES) launched = 0;
  struct launch* l = &launches[recording ? launched++ : 0];
  pthread_mutex_unlock(&lock);
  l->function = f, l->shared = shared, l->stream = stream, l->context = current_context;
  l->grid[0] = gx, l->grid[1] = gy, l->grid[2] = gz, l->block[0] = bx, l->block[1] = by, l->block[2] = bz;
  l->parameters = f->parameters;
  for (int i = 0; i < f->parameters; ++i) {
    l->sizes[i] = f->sizes[i], l->values[i] = 0;
    memcpy(&l->values[i], parameters[i], (size_t)f->sizes[i]);
  }
  return 0;
}
#endif

/* CUlaunchConfig, as cuda.h has it; what Triton's own launcher calls. */
struct config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
};
int cuLaunchKernelEx(const struct config* c, struct function* f, void** parameters, void** extra) {
#ifdef STANDIN_OLD
  (void)c, (void)f, (void)parameters, (void)extra;
  return 801;
#else
  if (c->count) return 801; /* CUDA_ERROR_NOT_SUPPORTED: none of our kernels has attributes */
  return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                        c->stream, parameters, extra);
#endif
}

int cuCtxGetCurrent(void** context) {
  note(__func__);
  return *context = current_context, 0;
}
int cuCtxSetCurrent(void* context) {
  note(__func__);
  return current_context = context, 0;
}
static _Thread_local void* below[16];
static _Thread_local int depth;
int cuCtxPushCurrent_v2(void* context) {
  note(__func__);
  below[depth++] = current_context, current_context = context, __atomic_fetch_add(&pushed, 1, __ATOMIC_RELAXED);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  note(__func__);
  *context = current_context, current_context = below[--depth];
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  note(__func__);
  return *context = (void*)(uintptr_t)(0xc0 + device), 0;
}

static void read_parameters(struct function* f) {
  const unsigned char* image = f->image;
  if (memcmp(image, "STANDIN", 7) == 0) {
    f->parameters = image[7];
    for (int i = 0; i < f->parameters; ++i) f->sizes[i] = image[8 + i];
    return;
  }
  const Elf64_Ehdr* elf = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + elf->e_shoff);
  const char* names = (const char*)image + sections[elf->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof(wanted), ".nv.info.%s", f->name);
  for (int s = 0; s < elf->e_shnum; ++s) {
    if (strcmp(names + sections[s].sh_name, wanted) != 0) continue;
    const unsigned char *at = image + sections[s].sh_offset, *end = at + sections[s].sh_size;
    while (at + 4 <= end) {
      const int format = at[0], attribute = at[1], length = format == 4 ? at[2] | at[3] << 8 : 0;
      if (attribute == 0x17 && length == 12) {
        uint32_t record[3];
        memcpy(record, at + 4, 12);
        const int ordinal = record[1] & 0xffff;
        f->sizes[ordinal] = (int)(record[2] >> 18);
        if (ordinal >= f->parameters) f->parameters = ordinal + 1;
      }
      at += 4 + length;
    }
  }
}

int cuModuleLoadData(const void** module, const void* image) { return *module = image, permitted(__func__); }
int cuModuleGetFunction(struct function** function, const void* module, const char* name) {
  struct function* f = &functions[loaded++ % LAUNCHES];
  memset(f, 0, sizeof(*f));
  snprintf(f->name, sizeof(f->name), "%s", name);
  f->image = module, f->context = current_context;
  read_parameters(f);
  return *function = f, 0;
}

int cuFuncGetAttribute(int* value, int attribute, struct function* f) {
  (void)f;
  return *value = attribute == 0 ? 1024 : 0, 0; /* CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK */
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device, (void)attribute;
  return *value = 49152, 0;
}
int cuGetErrorString(int code, const char** words) {
  *words = code == 719   ? "unspecified launch failure"
           : code == 201 ? "invalid device context"
           : code == 900 ? "operation not permitted when stream is capturing"
                         : 0;
  return *words ? 0 : 1;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) {
  (void)attribute;
  return *value = pointer, 0;
}
int cuFuncSetCacheConfig(void) { return 0; }
int cuFuncSetAttribute(void) { return 0; }
int cuCtxGetLimit(size_t* value) { return *value = 0, 0; }
int cuCtxSetLimit(void) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
