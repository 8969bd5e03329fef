// A row per processor that was measured: vendor, what multiplies there, and from and up to how many tokens the base
// product is this library's, and up to how many its gradient; the others are torch's. A row is measured by
// `python -m benchmarks crossovers`.
//
//             vendor,   unit,       float32: from, base, gradient, bfloat16: from, base, gradient
CRAM_CROSSOVER("Intel",  "tiles",    1, 16, 0,   1, 1024, 1024)
CRAM_CROSSOVER("AMD",    "pairs",    1, 64, 0,   1, 32, 0)
CRAM_CROSSOVER("AMD",    "avx2",     1, 64, 0,   1, 64, 0)
// Any other processor. Where torch has no fast bfloat16 product, ours is the better one for longer.
CRAM_CROSSOVER("",       "tiles",    2, 8, 0,    1, 8, 0)
CRAM_CROSSOVER("",       "pairs",    1, 8, 0,    1, 8, 0)
CRAM_CROSSOVER("",       "avx512",   1, 8, 0,    1, 64, 0)
CRAM_CROSSOVER("",       "avx2",     1, 8, 0,    1, 64, 0)
CRAM_CROSSOVER("",       "baseline", 1, 8, 0,    1, 8, 0)
