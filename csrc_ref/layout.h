// The facts of engine.h that a caller in another language repeats, as a table that the caller compares with its own.
#pragma once

#include <cstddef>
#include <type_traits>

#include "engine.h"

namespace tob {

// A field's type as a letter of Python's `struct` module, or the name of a struct.
template <class Field> constexpr const char *type_name() {
  if constexpr (std::is_pointer_v<Field>) return "P";
  else if constexpr (std::is_same_v<Field, int64_t>) return "q";
  else if constexpr (std::is_same_v<Field, uint64_t>) return "Q";
  else if constexpr (std::is_same_v<Field, uint32_t>) return "I";
  else if constexpr (std::is_same_v<Field, double>) return "d";
  else if constexpr (std::is_same_v<Field, tob_tensor>) return "tob_tensor";
  else static_assert(!sizeof(Field), "a type that has no name here");
}

template <class... Arguments> constexpr int64_t pointers_of(int (*)(Arguments...)) {
  static_assert((std::is_pointer_v<Arguments> && ...));
  return sizeof...(Arguments);
}

#define TOB_STRUCT(type) {#type, "bytes", sizeof(type)}
#define TOB_FIELD(type, field) {#type "." #field, type_name<decltype(type::field)>(), offsetof(type, field)}
#define TOB_FUNCTION(function) {#function, "pointers", pointers_of(function)}
#define TOB_NUMBER(number) {#number, "number", number}
inline constexpr tob_layout_entry kLayout[] = {
    TOB_STRUCT(tob_tensor),
    TOB_FIELD(tob_tensor, data),
    TOB_FIELD(tob_tensor, stride_b),
    TOB_FIELD(tob_tensor, stride_h),
    TOB_FIELD(tob_tensor, stride_l),
    TOB_FIELD(tob_tensor, stride_d),
    TOB_STRUCT(tob_sequence),
    TOB_FIELD(tob_sequence, first_query),
    TOB_FIELD(tob_sequence, first_key),
    TOB_FIELD(tob_sequence, len_q),
    TOB_FIELD(tob_sequence, len_k),
    TOB_FIELD(tob_sequence, query_start),
    TOB_STRUCT(tob_row_stats),
    TOB_FIELD(tob_row_stats, row_max),
    TOB_FIELD(tob_row_stats, row_sum),
    TOB_STRUCT(tob_problem),
    TOB_FIELD(tob_problem, dtype),
    TOB_FIELD(tob_problem, num_threads),
    TOB_FIELD(tob_problem, batch),
    TOB_FIELD(tob_problem, heads_q),
    TOB_FIELD(tob_problem, heads_kv),
    TOB_FIELD(tob_problem, len_q),
    TOB_FIELD(tob_problem, len_k),
    TOB_FIELD(tob_problem, dim),
    TOB_FIELD(tob_problem, dim_v),
    TOB_FIELD(tob_problem, min_offset),
    TOB_FIELD(tob_problem, max_offset),
    TOB_FIELD(tob_problem, scale),
    TOB_FIELD(tob_problem, query),
    TOB_FIELD(tob_problem, key),
    TOB_FIELD(tob_problem, value),
    TOB_FIELD(tob_problem, sequences),
    TOB_FIELD(tob_problem, row_stride_b),
    TOB_FIELD(tob_problem, row_stride_h),
    TOB_FIELD(tob_problem, bias),
    TOB_FIELD(tob_problem, bias_batch),
    TOB_FIELD(tob_problem, bias_heads),
    TOB_FIELD(tob_problem, bias_columns),
    TOB_FIELD(tob_problem, bias_first),
    TOB_FIELD(tob_problem, gate),
    TOB_FIELD(tob_problem, rank),
    TOB_FIELD(tob_problem, key_mask),
    TOB_FIELD(tob_problem, query_positions),
    TOB_FIELD(tob_problem, key_positions),
    TOB_FIELD(tob_problem, position_stride_q),
    TOB_FIELD(tob_problem, position_stride_k),
    TOB_FIELD(tob_problem, is_causal_by_index),
    TOB_FIELD(tob_problem, has_dropout),
    TOB_FIELD(tob_problem, seed),
    TOB_FIELD(tob_problem, largest_dropped),
    TOB_FIELD(tob_problem, kept_scale),
    TOB_FIELD(tob_problem, dropout_query),
    TOB_FIELD(tob_problem, dropout_key),
    TOB_FIELD(tob_problem, dropout_head),
    TOB_FIELD(tob_problem, dropout_heads),
    TOB_FIELD(tob_problem, is_part),
    TOB_FUNCTION(tob_forward),
    TOB_FUNCTION(tob_backward),
    TOB_NUMBER(TOB_FLOAT32),
    TOB_NUMBER(TOB_FLOAT64),
    TOB_NUMBER(TOB_BFLOAT16),
    TOB_NUMBER(TOB_FLOAT16),
    TOB_NUMBER(TOB_ERROR_MEMORY),
    TOB_NUMBER(TOB_MAX_DIM),
    TOB_NUMBER(TOB_MAX_RANK),
    TOB_NUMBER(TOB_MAX_LENGTH),
    TOB_NUMBER(TOB_MAX_SPREAD),
    TOB_NUMBER(TOB_UNLIMITED),
    {nullptr, nullptr, 0},
};
#undef TOB_STRUCT
#undef TOB_FIELD
#undef TOB_FUNCTION
#undef TOB_NUMBER

}  // namespace tob
