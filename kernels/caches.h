// What the kernels want to know of the processor's caches.
#pragma once

namespace pio {

// Whether the first-level data cache has few ways. Streams that lie whole pages apart use the same lines of it: eight
// panels and their scales push each other out of eight ways (Zen to Zen 4) before they are read, and fit into twelve
// (Sapphire Rapids, Zen 5). Then memory is asked for into the second level, further ahead.
bool few_ways();
// Takes it for that from now on, to compare both and to test them on one machine.
void set_few_ways(bool few);

}  // namespace pio
