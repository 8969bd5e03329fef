"""Triton kernels of the expert layer: three matrix templates, the gates they share, and the gate gradient.

    shrink          Z = X A^T                    V = dY Bt^T
    expand          Y += (Z o w) Bt              dX += drop((V o w) A)
    gram            dA = (V o w)^T drop(X)       dBt = (Z o w)^T dY
    gate_gradient   dg[s, e] = scale * sum of Z o V over the segment's tokens and the expert's rows

w[t, c] = scale * gates[s(t), owner[c]] is never stored: every kernel gates what it loads. Because B is stored
transposed, forward and backward use the same templates. Each module holds its jitted functions and the
launchers that describe their launches; nothing here runs anything.
"""
