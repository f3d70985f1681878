"""Sum weighted rows of a weight: the decoder of sparse codes, and the mean row of a linear head under its softmax.

In come indices with values, or a head's input; out go sums of the weight's rows, [A, D] or [S, D]. Read
`sparse_decode` first; its gradient to the weight is `sparse_decode_weight`, and `softmax_mean` stands alone.
"""
