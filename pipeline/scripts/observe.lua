#!lua flags=allow-oom
-- observe: share how calls to replicas went: recent speed, and the circuit breaker.
-- ARGV[1] failures in a row that open the breaker  ARGV[2] how long it stays open (ms)
-- ARGV[3] silence after which what was known says nothing any more (ms)
-- then per call 4 values: URL, 'ok' | 'failed' | 'refused', duration (us; 0: no measure of speed), completion tokens (0:
--   unknown)
-- Returns: time (us), then per call 'closed' | 'opened' | 'open' | 'closed_again'.
-- Invariant: a success closes the breaker; while it is half open one failure opens it again.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local WEIGHT = 0.2 -- of the newest observation: about the last ten calls count
local answer = {digits(now_us)}
local function blend(old, new)
  old = tonumber(old or '') -- a stranger may have written no number there
  return old and old * (1 - WEIGHT) + new * WEIGHT or new
end
local function known(value)
  return tonumber(value or '') or 0
end
for i = 4, #ARGV, 4 do
  local key = KEY.health .. ARGV[i]
  local seen = call('HMGET', key, 'us_per_token', 'tokens', 'failures', 'open_until_ms', 'seen_ms')
  -- A replica that was shunned for being slow is tried by one job now and then: that job's measure stands alone, or it
  -- would take a dozen of them, minutes apart, to say that the replica is fast again.
  if now_ms - known(seen[5]) > tonumber(ARGV[3]) then seen[1], seen[2] = false, false end
  local open_until = known(seen[4])
  if ARGV[i + 1] == 'ok' then
    local duration_us, tokens = tonumber(ARGV[i + 2]), math.max(1, tonumber(ARGV[i + 3]))
    call('HSET', key, 'failures', 0, 'open_until_ms', 0, 'seen_ms', digits(now_ms))
    if duration_us > 0 then
      call('HSET', key, 'us_per_token', blend(seen[1], duration_us / tokens), 'tokens', blend(seen[2], tokens))
    end
    answer[#answer + 1] = open_until > 0 and 'closed_again' or 'closed'
    if open_until > 0 then wake = true end
  else
    local failures = known(seen[3]) + 1
    local opens = ARGV[i + 1] == 'refused' or failures >= tonumber(ARGV[1]) or open_until > 0
    if opens then
      call('HSET', key, 'failures', failures, 'open_until_ms', digits(now_ms + tonumber(ARGV[2])))
      answer[#answer + 1] = open_until > now_ms and 'open' or 'opened'
    else
      call('HSET', key, 'failures', failures)
      answer[#answer + 1] = 'closed'
    end
  end
  call('PEXPIRE', key, 3600000)
end
conclude()
return answer
