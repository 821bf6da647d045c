#!lua
-- persona: put a persona in the place of what was there under this name.
-- ARGV[1] persona (as it stands in its key)  ARGV[2] name  ARGV[3] tenant  ARGV[4] all of it (JSON, for the recorder)
-- ARGV[5] personas that the tenant may have  then pairs: name, value ('' none)
-- Returns: 'set' | 'full' (the tenant has as many personas as it may).
-- Invariant: whoever reads sees the old persona or the new one.
local now_us = clock_us()
local key = KEY.persona .. ARGV[1]
check_type(key, 'hash')
check_type(KEY.events, 'stream')
if not enrol(KEY.personas, ARGV[1], ARGV[5]) then return 'full' end
for i = 6, #ARGV, 2 do
  if ARGV[i + 1] == '' then call('HDEL', key, ARGV[i]) else call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
remember('persona', ARGV[2], ARGV[3], digits(math.floor(now_us / 1000)), now_us, ARGV[4])
return 'set'
