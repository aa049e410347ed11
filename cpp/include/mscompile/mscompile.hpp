// Everything: open a bundle, run it, generate text.
#pragma once

#include "mscompile/bundle.hpp"
#include "mscompile/error.hpp"
#include "mscompile/generate.hpp"
#include "mscompile/session.hpp"
#include "mscompile/tokenizer.hpp"
