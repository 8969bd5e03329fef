"""Triton kernels of the expert layer: three matrix templates, and the small launches around them.

    dropout_bits    the dropout mask of a call, as bits
    shrink          Z = drop(X) A^T              V = dY Bt^T
    fold            U = Z o w                    dZ = V o w        planes of a split SHRINK added first
    expand          Y += U Bt                    dX += drop(dZ A)
    gram            dA = dZ^T drop(X)            dBt = U^T dY
    gate_gradient   dg[s, e] = scale * sum of Z o V over the segment's tokens and the expert's rows

w[t, c] = scale * gates[s(t), owner[c]] is never stored: FOLD (in decoding SHRINK) multiplies by it where Z is
made. Because B is stored transposed, forward and backward use the same templates. Each module holds its
jitted functions and the launchers that describe their launches; nothing here runs anything.
"""
