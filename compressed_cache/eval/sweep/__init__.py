"""Many evaluations, each of them once: tasks by policies by budgets by seeds.

``plan`` says which cells there are, ``cell`` runs them in this process, as ``accuracy`` or
``agreement`` measures, ``processes`` and ``cluster`` run many, ``folder`` remembers which are done.
"""
