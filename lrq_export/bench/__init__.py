"""`lrq-export bench`: a package's targets beside the floating-point model it was made from.

run           takes turns, and tells times, throughput, memory and speedups as rows
contenders    what takes part: targets and baselines, each on one device
memory        what each of them needs, in a process of its own
"""
