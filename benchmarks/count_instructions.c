/* A plugin of QEMU (-plugin file=…): counts the instructions that a program for 64-bit Arm executes, and those of them
   that are multiply-adds of vectors. For one thread. Of QEMU's interface it declares what it uses, as Debian has no
   package with the header. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>

enum { ADD_U64 = 0 };
struct qemu_plugin_tb;
struct qemu_plugin_insn;
int qemu_plugin_version = 1;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*callback)(uint64_t, struct qemu_plugin_tb*));
void qemu_plugin_register_atexit_cb(uint64_t id, void (*callback)(uint64_t, void*), void* data);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb* tb, int operation, void* counter, uint64_t step);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn* insn);

static uint64_t instructions, multiply_adds;

/* FMLA of vectors, in float32 or float16, by vector or by element. */
static int is_multiply_add(uint32_t code) {
  const uint32_t by_vector = code & 0xbfa0fc00u, by_half_vector = code & 0xbfe0fc00u;
  const uint32_t by_element = code & 0xbf80f400u, by_half_element = code & 0xbfc0f400u;
  return by_vector == 0x0e20cc00u || by_half_vector == 0x0e400c00u || by_element == 0x0f801000u ||
         by_half_element == 0x0f001000u;
}

static void translated(uint64_t id, struct qemu_plugin_tb* tb) {
  const size_t count = qemu_plugin_tb_n_insns(tb);
  uint64_t found = 0;
  (void)id;
  for (size_t i = 0; i < count; ++i) {
    const unsigned char* bytes = qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i));
    found += is_multiply_add(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (uint32_t)bytes[3] << 24);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &instructions, count);
  if (found) qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &multiply_adds, found);
}

static void ended(uint64_t id, void* data) {
  (void)id, (void)data;
  fprintf(stderr, "instructions %" PRIu64 "\nmultiply_adds %" PRIu64 "\n", instructions, multiply_adds);
}

int qemu_plugin_install(uint64_t id, const void* info, int count, char** arguments) {
  (void)info, (void)count, (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
