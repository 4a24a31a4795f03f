"""What runs inside the sandbox. Standard library only: nothing else of the package exists in there.

:mod:`zygote` is started once and forks cells; :mod:`warden` is the trusted first process of each cell; :mod:`guest`
runs what a model wrote. :mod:`wall` builds the outer wall and those of a cell, :mod:`seccomp` and :mod:`landlock` are
the filters that a guest cannot take off again, :mod:`framing` and :mod:`plain` are how the processes talk.
"""
