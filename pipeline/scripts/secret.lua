#!lua flags=allow-oom
-- secret: a queue's secrets; makes one where there is none, or replaces it.
-- ARGV[1] queue  ARGV[2] a fresh secret  ARGV[3] 'rotate', or ''  ARGV[4] how long a replaced secret goes on signing (ms)
-- ARGV[5] queues that its tenant may have, '' for any number
-- Returns: the present secret, and the one before it while that still signs, else ''; 'refused' after them where it was
--   replaced so lately that the one before it still signs; {} where the queue would be one too many.
-- Invariant: whoever asks at the same time gets the same secret. One that has signed signs for ARGV[4] after it was replaced.
local key = KEY.queue .. ARGV[1]
check_type(key, 'hash')
if not enrol(KEY.queues, ARGV[1], ARGV[5]) then return {} end
local now_ms = math.floor(clock_us() / 1000)
local found = call('HMGET', key, 'secret', 'secret_before', 'secret_before_until_ms')
local secret, before = found[1], found[2]
if before and now_ms >= tonumber(found[3] or '0') then
  call('HDEL', key, 'secret_before', 'secret_before_until_ms')
  before = nil
end
if not secret then
  call('HSET', key, 'secret', ARGV[2])
  return {ARGV[2], ''}
end
if ARGV[3] == 'rotate' then
  if before then return {secret, before, 'refused'} end
  call('HSET', key, 'secret', ARGV[2], 'secret_before', secret, 'secret_before_until_ms', digits(now_ms + ARGV[4]))
  return {ARGV[2], secret}
end
return {secret, before or ''}
