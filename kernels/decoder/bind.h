#pragma once
#include <nanobind/nanobind.h>

namespace pio::decoder {

// Adds the submodule `decoder`: the native decoder and what it is made of.
void bind(nanobind::module_& module);

}  // namespace pio::decoder
