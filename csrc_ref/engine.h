/* The CPU engine of triton_offset_bias: exact attention with a bias per offset, forward and backward.
 *
 *   S[b,h,i,j] = scale * <query[b,h,i], key[b,hk,j]> + bias[b,h,offset]      offset = query_start + i - j
 *   out = (Z * softmax(S)) value          lse = log sum exp S          hk = h / (heads_q / heads_kv)
 *
 * A pair is attended to when min_offset <= offset <= max_offset and the key's mask byte is not 0. A row that attends to
 * nothing has out 0, lse -inf, and gives zero gradients. Z is dropout's factor, 1 without it. Nothing of size
 * len_q x len_k is ever stored.
 *
 * Arithmetic is in the "real" type: double where dtype is TOB_FLOAT64, float otherwise. The build for AVX512_BF16
 * rounds the factors of TOB_BFLOAT16 problems' products to bfloat16, softmax(S) and its gradient, and adds up in float.
 * All strides count elements. The caller owns every buffer; the engine allocates scratch of O(len_q + len_k) a head and
 * frees it before returning. Calls are re-entrant. Results are bitwise equal for any num_threads. The floating-point
 * environment is restored. Every function returns 0, or a TOB_ERROR; then the outputs are undefined.
 */
#ifndef TOB_ENGINE_H
#define TOB_ENGINE_H

#include <stdint.h>

#define TOB_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { TOB_FLOAT32 = 0, TOB_FLOAT64 = 1, TOB_BFLOAT16 = 2, TOB_FLOAT16 = 3 };
enum { TOB_ERROR_MEMORY = 1, TOB_ERROR_ARGUMENT = 2 };

#define TOB_MAX_DIM 256                   /* of query, key and value */
#define TOB_MAX_LENGTH ((int64_t)1 << 30) /* lengths are below it */
#define TOB_MAX_SPREAD ((int64_t)1 << 29) /* given positions of a sequence differ by less */
#define TOB_UNLIMITED ((int64_t)1 << 61)  /* as max_offset, and negated as min_offset: every offset is allowed */

/* A (batch, heads, length, dim) tensor of the problem's dtype. */
typedef struct {
  void *data;
  int64_t stride_b, stride_h, stride_l, stride_d;
} tob_tensor;

/* A sequence of the batch: its rows in the tensors, and the position of its first query counted from its first key. */
typedef struct {
  int64_t first_query, first_key, len_q, len_k, query_start;
} tob_sequence;

typedef struct {
  int64_t dtype;       /* of query, key, value, out and their gradients */
  int64_t num_threads; /* >= 1 */
  int64_t batch, heads_q, heads_kv;
  int64_t len_q, len_k; /* of the longest sequence */
  int64_t dim;          /* of query and key, 1..TOB_MAX_DIM */
  int64_t dim_v;        /* of value and out, 1..TOB_MAX_DIM */
  int64_t min_offset, max_offset;
  double scale;
  tob_tensor query, key, value;
  const tob_sequence *sequences;      /* (batch): where packed in one tensor, its stride_b is 0 */
  int64_t row_stride_b, row_stride_h; /* of what there is one of for every query: see tob_row_stats */
  /* NULL, or (bias_batch, bias_heads, bias_columns) contiguous reals in nats: the offset o sees column
     clamp(o - bias_first, 0, bias_columns - 1). bias_batch is 1 or batch, bias_heads is 1 or heads_q. */
  const void *bias;
  int64_t bias_batch, bias_heads, bias_columns, bias_first;
  /* NULL, or (batch, len_k) contiguous bytes: 0 = do not attend. */
  const uint8_t *key_mask;
  /* NULL, or (len_q) and (len_k) positions for each sequence, position_stride_* apart: offset is then their difference,
     of magnitude below TOB_MAX_SPREAD, and query_start is not looked at. */
  const int32_t *query_positions, *key_positions;
  int64_t position_stride_q, position_stride_k;
  /* Dropout, if has_dropout: which weights by dropout.h. */
  int64_t has_dropout;
  uint64_t seed;
  uint32_t largest_dropped;
  double kept_scale;
} tob_problem;

/* A real for every query, that of query i of a sequence at b row_stride_b + h row_stride_h + first_query + i: the
   softmax, as P = exp2(S log2(e) - row_max) / row_sum, where S is counted from a constant of the row of the bias. Kept
   apart because row_max + log2(row_sum) would round. A row that attends to nothing has row_max +inf, row_sum 0. */
typedef struct {
  void *row_max, *row_sum;
} tob_row_stats;

TOB_API int tob_forward(const tob_problem *problem, const tob_tensor *out, void *lse /* as row_max, in nats */,
                        const tob_row_stats *stats);

/* Gradients; len_q and len_k at least 1. out and stats may be of rows that attended to more keys, through the same
   bias: gradients from parts of the keys add up to those from all. dlse may be NULL (zero). Of dquery, dkey, dvalue
   (their `data`) and dbias, those that are NULL are not computed. dbias: as bias, summed over batch and heads where
   bias_batch and bias_heads are 1. */
TOB_API int tob_backward(const tob_problem *problem, const tob_tensor *out, const tob_row_stats *stats,
                         const tob_tensor *dout, const void *dlse, const tob_tensor *dquery, const tob_tensor *dkey,
                         const tob_tensor *dvalue, void *dbias);

/* The widest build of this engine that the processor can run: "avx512_bf16", "avx512", "avx2" or "portable". It can run
   those behind it too. */
TOB_API const char *tob_widest_build(void);

/* Whether the processor is Intel's: their products of bfloat16 numbers take longer than those of floats. */
TOB_API int tob_is_intel(void);

/* What this build computes with, for people. */
TOB_API const char *tob_build_description(void);

/* One fact about this header as the build was compiled with it: the size of a struct, of type "bytes"; the offset in
   bytes of a struct's field, whose type is a letter of Python's `struct` module or the name of a struct; the number of
   arguments of a function, of type "pointers"; or a constant, of type "number". */
typedef struct {
  const char *name, *type;
  int64_t value;
} tob_layout_entry;

/* All of them, up to one without a name. A caller that was written for other ones must not call the engine. */
TOB_API const tob_layout_entry *tob_layout(void);

#ifdef __cplusplus
}
#endif
#endif
