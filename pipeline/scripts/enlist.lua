#!lua flags=allow-oom
-- enlist: say that a gateway lives, and drop those that have not said so for a while.
-- ARGV[1] the gateway's record (JSON)  ARGV[2] how long it holds (ms)
-- Returns: time (us).
-- Invariant: the list holds nobody who has been silent for longer, and vanishes with the last of them.
local now_us = clock_us()
check_type(KEY.gateways, 'zset')
call('ZADD', KEY.gateways, digits(now_us), ARGV[1])
call('ZREMRANGEBYSCORE', KEY.gateways, '-inf', digits(now_us - tonumber(ARGV[2]) * 1000))
call('PEXPIRE', KEY.gateways, ARGV[2])
return digits(now_us)
