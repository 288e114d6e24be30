"""The kernels, looked at from outside: ``smalt kernels check | configure | traffic`` without a GPU, ``smalt bench kernels`` with one.

cases.py         what to compile: each operation at the shapes of the 3B model
others.py        the same operations in Liger and flash-linear-attention
compile.py       a recorded launch, compiled for a chip as Triton would at run time
machine_code.py  registers, stack, spills, shared memory, matrix instructions, copies
loops.py         the loops of the machine code, their instructions by pipe, the bound that these set
chips.py         limits and rates of the chips
worker.py        the process that compiles
check.py         the table, and what may not get worse
report.py        the table, to read
launch_model.py  tiles, warps and stages by a model of each chip
configure.py     the model's choices, confirmed by the compiler, into the launch tables
traffic.py       bytes loaded and stored, counted in the interpreter
bench*.py        correctness on a GPU, then times beside other libraries
"""
