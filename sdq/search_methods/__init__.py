"""Search methods: one file each, whose ``choose(problem)`` returns a candidate for every unit."""
