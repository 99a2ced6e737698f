// The C entry points: argument checks, the choice of arithmetic type, and no exception past this file.
#include "engine.h"

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "layout.h"
#if TOB_AMX
#include "amx_products.h"
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if TOB_AMX
using BFloat16Products = tob::AmxProducts;
#else
using BFloat16Products = tob::RegisterProducts<float, tob::BFloat16Operand>;
#endif

bool is_valid(const tob_problem &p) {
  const bool sizes = p.batch >= 0 && p.heads_q >= 0 && p.heads_kv >= 0 && p.len_q >= 0 && p.len_k >= 0 && p.dim >= 1 &&
                     p.dim <= tob::kMaxDim && p.dim_v >= 1 && p.dim_v <= tob::kMaxDim && p.num_threads >= 1;
  bool lengths = p.len_q < TOB_MAX_LENGTH && p.len_k < TOB_MAX_LENGTH;
  for (int64_t b = 0; b < p.batch; ++b) {
    const tob_sequence &s = p.sequences[b];
    lengths = lengths && s.len_q >= 0 && s.len_q <= p.len_q && s.len_k >= 0 && s.len_k <= p.len_k;
  }
  const bool heads = p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0;
  const bool bias = !p.bias || ((p.bias_batch == 1 || p.bias_batch == p.batch) &&
                                (p.bias_heads == 1 || p.bias_heads == p.heads_q) && p.bias_columns >= 1);
  const bool gate = p.gate.data ? p.bias && p.rank >= 1 && p.rank <= TOB_MAX_RANK : p.rank == 1;
  return sizes && lengths && heads && bias && gate && p.dtype >= TOB_FLOAT32 && p.dtype <= TOB_FLOAT16;
}

template <class Run> int guarded(const tob_problem &problem, Run run) {
  if (!is_valid(problem)) return TOB_ERROR_ARGUMENT;
  try {
    if (problem.dtype == TOB_FLOAT64) run(tob::RegisterProducts<double, double>());
    else if (problem.dtype == TOB_BFLOAT16) run(BFloat16Products());
    else run(tob::RegisterProducts<float, float>());
    return 0;
  } catch (const std::bad_alloc &) {
    return TOB_ERROR_MEMORY;
  }
}

#if defined(__x86_64__)
// A leaf of the processor's description of itself. Not every compiler knows the features below by name.
struct CpuId {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuId(unsigned leaf, unsigned part = 0) { __get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx); }
};

bool has_f16c() { return CpuId(1).ecx >> 29 & 1; }
// Whether vectors of AVX-512 multiply bfloat16 numbers. Part 0 says which parts of the leaf there are.
bool has_avx512_bf16() { return CpuId(7).eax >= 1 && (CpuId(7, 1).eax >> 5 & 1); }
// Whether the processor multiplies bfloat16 numbers in tiles.
bool has_amx() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  const unsigned found = CpuId(7).edx;
  return (found & kBFloat16) && (found & kTiles);
}
#endif

}  // namespace

extern "C" {

int tob_forward(const tob_problem *problem, const tob_tensor *out, void *lse, const tob_row_stats *stats) {
  return guarded(*problem, [&](auto products) {
    using Products = decltype(products);
    const tob::Outputs<typename Products::Real> outputs(*problem, *out, lse, *stats);
    using Decode = tob::Decode<typename Products::Real, typename Products::Operand>;
    if (Decode::serves(*problem)) Decode(*problem, outputs).run();
    else tob::Forward<Products>(*problem, outputs).run();
  });
}

int tob_backward(const tob_problem *problem, const tob_tensor *out, const tob_row_stats *stats, const tob_tensor *dout,
                 const void *dlse, const tob_tensor *dquery, const tob_tensor *dkey, const tob_tensor *dvalue,
                 const tob_tensor *dgate, void *dbias) {
  if (problem->len_q < 1 || problem->len_k < 1) return TOB_ERROR_ARGUMENT;
  return guarded(*problem, [&](auto products) {
    using Real = typename decltype(products)::Real;
    const auto reals = [](const void *data) { return static_cast<const Real *>(data); };
    const tob::QueryTensors<Real> tensors{*out,       *dout, *dquery, reals(stats->row_max), reals(stats->row_sum),
                                          reals(dlse)};
    tob::Backward<decltype(products)>(*problem, tensors, *dkey, *dvalue, *dgate, dbias).run();
  });
}

const char *tob_widest_build(void) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && has_avx512_bf16()) return has_amx() ? "amx" : "avx512_bf16";
  if (has_avx512) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return "avx2";
#endif
  return "portable";
}

int tob_request_tiles(void) {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

int tob_is_intel(void) {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return 0;
#endif
}

const char *tob_build_description(void) {
#if defined(__AMX_BF16__)
#define TOB_PRODUCTS ", bfloat16 products in AMX tiles"
#elif TOB_AMX
#define TOB_PRODUCTS ", bfloat16 products in emulated AMX tiles"
#elif TOB_BFLOAT16_PRODUCTS
#define TOB_PRODUCTS ", bfloat16 products"
#else
#define TOB_PRODUCTS ""
#endif
#if defined(__AVX512F__)
  return "512-bit vectors, AVX-512, 12 x 32 float tiles" TOB_PRODUCTS;
#elif defined(__AVX2__)
  return "256-bit vectors, AVX2 and FMA, 6 x 16 float tiles" TOB_PRODUCTS;
#else
  return "128-bit vectors, baseline instructions, 6 x 8 float tiles" TOB_PRODUCTS;
#endif
}

const tob_layout_entry *tob_layout(void) { return tob::kLayout; }

}  // extern "C"
