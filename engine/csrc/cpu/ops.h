// Every CPU kernel's entry point: what bindings.cpp calls and what the Python side documents.
#pragma once
#include <cstdint>

#include "common.h"

namespace caduceus {

// ---- linear ----

// ---- attention ----

// ---- rms_norm, swiglu, embedding ----

// ---- token_logprob, sample_token ----

// ---- adamw ----

}  // namespace caduceus
