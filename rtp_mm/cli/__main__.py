"""`python -m rtp_mm.cli` is `rtp-mm`."""

from __future__ import annotations

import sys

from rtp_mm.cli import main

sys.exit(main())
