import sys

from fastinterp.cli import main

sys.exit(main())
