"""The mathematics: pure functions, and thin Linen declarations over them. One idea a file.

Letters, here and in every einsum: B batch, T query length, S key length, D hidden, H query heads,
K key/value heads, G = H // K, d head size, F feed-forward width, V vocabulary, L layers, E experts,
k chosen experts.
"""
