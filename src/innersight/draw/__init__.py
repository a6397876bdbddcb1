"""Results into pictures: `color` turns values into colors (arrays only), `plots` lays them out as figures."""
