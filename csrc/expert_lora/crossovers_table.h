// A row per processor that was measured: vendor, what multiplies there, and up to how many tokens the base product and
// its gradient are this library's; beyond, they are torch's. `python -m benchmarks crossovers` measures a row.
//
//             vendor,   unit,       float32: base, gradient, bfloat16: base, gradient
CRAM_CROSSOVER("Intel",  "tiles",    16, 0,  1024, 1024)
CRAM_CROSSOVER("AMD",    "pairs",    64, 0,  32, 0)
CRAM_CROSSOVER("AMD",    "avx2",     64, 0,  64, 0)
// Any other processor. Where torch has no fast bfloat16 product, ours is the better one for longer.
CRAM_CROSSOVER("",       "tiles",    8, 0,   8, 0)
CRAM_CROSSOVER("",       "pairs",    8, 0,   8, 0)
CRAM_CROSSOVER("",       "avx512",   8, 0,   64, 0)
CRAM_CROSSOVER("",       "avx2",     8, 0,   64, 0)
CRAM_CROSSOVER("",       "baseline", 8, 0,   8, 0)
