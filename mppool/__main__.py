from mppool.cli import main

main()
