/* Values of the 256 codes, ascending, and the code at each of 65536 places between -1 and 1. */
#ifndef FQ_DYNAMIC_MAP_H
#define FQ_DYNAMIC_MAP_H

#include <stdint.h>

#pragma GCC visibility push(hidden)
extern float fq_dynamic_values[256];
extern uint8_t fq_dynamic_places[65536];
#pragma GCC visibility pop

#endif
