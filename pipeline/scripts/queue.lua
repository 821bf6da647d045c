#!lua
-- queue: put defaults in the place of those that a queue has.
-- ARGV[1] queue (as it stands in its key)  ARGV[2] queue id  ARGV[3] tenant  ARGV[4] the defaults (JSON, for the recorder)
-- ARGV[5] queues that the tenant may have  then pairs: name, value ('' none)
-- Returns: 'set' | 'full' (the tenant has as many queues as it may).
-- Invariant: whoever reads sees the old defaults or the new ones; the queue's secrets stay.
local now_us = clock_us()
local key = KEY.queue .. ARGV[1]
check_type(key, 'hash')
check_type(KEY.events, 'stream')
if not enrol(KEY.queues, ARGV[1], ARGV[5]) then return 'full' end
for i = 6, #ARGV, 2 do
  if ARGV[i + 1] == '' then call('HDEL', key, ARGV[i]) else call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
remember('queue', ARGV[2], ARGV[3], digits(math.floor(now_us / 1000)), now_us, ARGV[4])
return 'set'
