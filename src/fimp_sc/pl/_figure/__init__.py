"""The contract of figures and their shared parts.

A figure is one file of :mod:`fimp_sc.pl` with one public function. It finds its object (``_common``) and its values
(``_values``), colors them (``_coloring``), and draws into the axes of a ``Canvas``, which shows, writes or returns them
by the arguments ``title``, ``ax``, ``show``, ``save`` and ``return_fig`` that all figures share.
"""
