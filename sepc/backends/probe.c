/* What a device is asked through TVM's RPC: to run a command of its shell. */
#include <stdint.h>
#include <stdio.h>
#include <sys/wait.h>

#ifndef OUTPUT_BYTES
#error "give -DOUTPUT_BYTES"
#endif

/* TVM's runtime has this function, which then comes first. */
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count);
__attribute__((weak)) void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}

/* Runs `command`, which ends with a zero, and writes what it prints to `output`, a zero behind it. Returns its exit
   status, or a negative number if it could not be run, or prints more than there is room for. */
int32_t sepc_shell(void* command, void* output) {
  char* text = output;
  char rest[4096];
  FILE* pipe = popen(command, "r");
  size_t used;
  int status, more = 0;
  if (!pipe) return -1;
  used = fread(text, 1, OUTPUT_BYTES - 1, pipe);
  text[used] = 0;
  while (fread(rest, 1, sizeof rest, pipe)) more = 1;
  status = pclose(pipe);
  if (more) return -2;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -3;
}
