"""What a benchmark needs: clocks, random weights of the published sizes, the slow way."""
