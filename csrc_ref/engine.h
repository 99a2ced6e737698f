/* The fast CPU engine of triton_offset_bias, whatever its folder is called: exact attention with a bias per offset,
 * forward and backward. The slow reference is plain PyTorch, in triton_offset_bias/backends/reference.py.
 *
 *   S[b,h,i,j] = scale * <query[b,h,i], key[b,hk,j]> + bias[b,h,offset]      offset = query_start + i - j
 *   out = (Z * softmax(S)) value          lse = log sum exp S          hk = h / (heads_q / heads_kv)
 *
 * A pair is attended to when min_offset <= offset <= max_offset and the key's mask byte is not 0. A row that attends to
 * nothing has out 0, lse -inf, and gives zero gradients. Z is dropout's factor, 1 without it. Nothing of size
 * len_q x len_k is ever stored.
 *
 * Arithmetic is in the "real" type: double where dtype is TOB_FLOAT64, float otherwise. For TOB_BFLOAT16 problems the
 * builds for AVX512_BF16 and AMX multiply bfloat16 numbers and add the products up in float: they round softmax(S) and
 * the gradient of S to bfloat16 before they multiply them.
 * All strides count elements. The caller owns every buffer. The engine allocates scratch memory of O(len_q + len_k) for
 * each head, and of the size of its tables if it has a gate of several numbers. It frees the memory before it returns.
 * Calls are re-entrant. Results are bitwise equal for any num_threads. The floating-point environment is restored.
 * tob_forward and tob_backward return 0, or a TOB_ERROR; after an error the outputs are undefined.
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
#define TOB_MAX_RANK 256                  /* of gates */
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
  const tob_sequence *sequences;      /* (batch); tensors of packed sequences have stride_b 0 */
  int64_t row_stride_b, row_stride_h; /* of row_max, row_sum, lse and dlse: see tob_row_stats */
  /* NULL, or (bias_batch, bias_heads, bias_columns) contiguous reals in nats. A pair at offset o
     gets the bias of column clamp(o - bias_first, 0, bias_columns - 1). bias_batch is 1 or batch, bias_heads is 1 or
     heads_q. */
  const void *bias;
  int64_t bias_batch, bias_heads, bias_columns, bias_first;
  /* data is NULL, or points at reals, (batch, heads_q, len_q, rank), that are factors of the bias. The bias is then
     (bias_batch, bias_heads, rank, bias_columns), all finite, and that of a pair is the sum over r of gate[b,h,i,r]
     times the number of row r in the pair's column. rank is 1..TOB_MAX_RANK, and 1 without a gate. A gate needs a
     bias. */
  tob_tensor gate;
  int64_t rank;
  /* NULL, or (batch, len_k) contiguous bytes: 0 = do not attend. */
  const uint8_t *key_mask;
  /* NULL, or the positions of the len_q queries and of the len_k keys of each sequence. The positions of sequence b
     begin at element b * position_stride_q or b * position_stride_k. A pair's offset is then the query's position minus
     the key's. Its magnitude must be below TOB_MAX_SPREAD. query_start is read only if is_causal_by_index is not 0:
     query i then attends to no key behind query_start + i. */
  const int32_t *query_positions, *key_positions;
  int64_t position_stride_q, position_stride_k;
  int64_t is_causal_by_index;
  /* dropout.h makes a random number for each weight from the seed. If has_dropout is not 0, a weight is dropped if its
     number is at most largest_dropped. Otherwise the weight is multiplied by kept_scale. */
  int64_t has_dropout;
  uint64_t seed;
  uint32_t largest_dropped;
  double kept_scale;
  /* The places of query 0, key 0 and head 0 where random numbers are counted, and the number of heads there. A call
     with all rows and heads has 0, 0, 0 and heads_q. */
  int64_t dropout_query, dropout_key, dropout_head, dropout_heads;
  /* If it is not 0, the call has a part of the keys, and goes on from the results of calls with other parts: see
     tob_forward and tob_backward. out of tob_forward, dquery, dkey and dvalue then hold reals. */
  int64_t is_part;
} tob_problem;

/* The statistics of the softmax: two reals for every query. The element of query i of sequence b in head h is
   b * row_stride_b + h * row_stride_h + first_query + i; lse and dlse have the same elements.
   The probabilities are P = exp2((S - c) log2(e) - row_max) / row_sum. c is a constant that the engine chooses for each
   (batch, head) row of the bias table, and 0 if is_part is not 0. row_max and row_sum are two numbers because row_max +
   log2(row_sum) would round. A query that attends to nothing has row_max +inf and row_sum 0. */
typedef struct {
  void *row_max, *row_sum;
} tob_row_stats;

/* If is_part is not 0, out holds sums and no means: out = sum of exp2(S log2(e) - row_max) Z value over all keys so
   far. out, row_max and row_sum are those of other parts, and this part is added. Rows whose row_sum is 0 begin with
   this part, whatever out and row_max hold. lse is not written, and may be NULL. */
TOB_API int tob_forward(const tob_problem *problem, const tob_tensor *out, void *lse /* in nats */,
                        const tob_row_stats *stats);

/* Writes the gradients. len_q and len_k must be at least 1. dlse may be NULL, which stands for zeros. A gradient is not
   computed if dbias, or the `data` of dquery, dkey, dvalue or dgate, is NULL. dbias has the shape of bias: it is summed
   over the batch where bias_batch is 1, and over the heads where bias_heads is 1. dgate holds reals, as gate does.
   `problem` may hold a part of the keys that out and stats were computed from, with the same bias: the gradients of all
   parts add up to the gradients of the whole. If is_part is not 0, dquery, dkey, dvalue and dgate are added to, and out
   is still the output of whole rows in `dtype`. */
TOB_API int tob_backward(const tob_problem *problem, const tob_tensor *out, const tob_row_stats *stats,
                         const tob_tensor *dout, const void *dlse, const tob_tensor *dquery, const tob_tensor *dkey,
                         const tob_tensor *dvalue, const tob_tensor *dgate, void *dbias);

/* The widest build of this engine that the processor can run: "amx", "avx512_bf16", "avx512", "avx2" or "portable". The
   processor can also run every build that stands later in this list. */
TOB_API const char *tob_widest_build(void);

/* Asks the operating system for the processor's tiles: 1 if it grants them, 0 if it refuses. Without them the build
   "amx" must not be called, even where it is the widest. The permission is the process's, until it ends. */
TOB_API int tob_request_tiles(void);

/* Whether Intel made the processor. Intel's processors multiply bfloat16 numbers more slowly than floats. */
TOB_API int tob_is_intel(void);

/* The vectors and instructions of this build, for people to read. */
TOB_API const char *tob_build_description(void);

/* One fact about this header as the build was compiled with it: the size of a struct, of type "bytes"; the offset in
   bytes of a struct's field, whose type is a letter of Python's `struct` module or the name of a struct; the number of
   arguments of a function, of type "pointers"; or a constant, of type "number". */
typedef struct {
  const char *name, *type;
  int64_t value;
} tob_layout_entry;

/* All entries; the last one has no name. A caller that expects other entries must not call the engine. */
TOB_API const tob_layout_entry *tob_layout(void);

#ifdef __cplusplus
}
#endif
#endif
