"""python -m jaxtok: the command line."""

from jaxtok.cli import main

raise SystemExit(main())
