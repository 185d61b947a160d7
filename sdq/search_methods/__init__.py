"""Search methods: one file each.

``choose(problem)`` returns a candidate for every unit of a
:class:`sdq.search_problem.SearchProblem`; ``CHOOSES_ACTS`` and ``CHOOSES_CHANNELS`` say whether
units may be activations or single channels.
"""
