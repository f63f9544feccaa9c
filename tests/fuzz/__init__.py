"""A fuzzer: damaged models, odd options and odd pictures, each in a process of its own with limits of time and memory.

    PYTHONPATH=tests:. python -m fuzz --mutants 1000 --seed 1        # counts by outcome; failures are listed
    PYTHONPATH=tests:. python -m fuzz --seed 1 --only 173            # mutant 173 again, with its traceback

Mutant k of seed s is the same whenever it is made. Hashes and the manifest's seal are fixed up for three mutants of
four, so that what lies behind the hash check is reached.
"""
